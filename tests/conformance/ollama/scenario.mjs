// Drives the emulator with the official JavaScript client. Prints one JSON object of what it saw.
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const [host, root] = process.argv.slice(2)
const require = createRequire(`${root}/`)
const { Ollama } = await import(pathToFileURL(require.resolve('ollama')).href)
const client = new Ollama({ host })
const messages = [{ role: 'user', content: 'Why is the sky blue?' }]
const seen = {}

const whole = await client.chat({ model: 'llama3.2', messages })
let text = ''
for await (const part of await client.chat({ model: 'llama3.2', messages, stream: true })) text += part.message.content
seen.streamEqualsWhole = text === whole.message.content && text.length > 0

const slow = await client.chat({ model: 'slow', messages, stream: true })
try {
  for await (const _ of slow) slow.abort()
} catch (error) {
  seen.abort = error.name
}

seen.pull = []
for await (const part of await client.pull({ model: 'tiny', stream: true })) seen.pull.push(part.status)
seen.create = (await client.create({ model: 'mine', from: 'llama3.2' })).status
seen.embed = (await client.embed({ model: 'all-minilm', input: ['a', 'b'] })).embeddings.map((v) => v.length)
seen.list = (await client.list()).models.length
seen.errors = []
for (const [call, body] of [['chat', { model: 'nope', messages }], ['show', { model: 'nope' }], ['delete', { model: 'nope' }]]) {
  try {
    await client[call](body)
  } catch (error) {
    seen.errors.push([error.status_code, error.message])
  }
}
try {
  for await (const _ of await client.pull({ model: 'nothing', stream: true }));
} catch (error) {
  seen.errors.push([0, error.message])
}
try {
  for await (const _ of await client.generate({ model: 'llama3.2', prompt: 'cut', stream: true }));
} catch (error) {
  seen.errors.push([0, error.message])
}
console.log(JSON.stringify(seen))
