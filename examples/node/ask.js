// Streams one reply from Forebay: the answer to standard output, what became of it to standard error.
import path from 'node:path';
import { fileURLToPath } from 'node:url';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';
import googleProtos from 'google-proto-files';

const DEADLINE_MS = 120_000; // a model may have to be loaded first

const definition = protoLoader.loadSync(
  ['forebay/inference/v1/inference.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto'],
  {
    includeDirs: [
      fileURLToPath(new URL('../../protos', import.meta.url)),
      path.dirname(googleProtos.getProtoPath()),
    ],
    enums: String,
    defaults: true,
    oneofs: true,
  },
);
const { InferenceService } = grpc.loadPackageDefinition(definition).forebay.inference.v1;

const args = process.argv.slice(2);
if (args.length === 2) args.unshift('127.0.0.1:50150');
if (args.length !== 3) {
  console.error('usage: node ask.js [ADDRESS] MODEL PROMPT');
  process.exit(2);
}
const [address, model, prompt] = args;

// One client, and so one connection, serves a whole program and all of its calls at once.
const client = new InferenceService(address, grpc.credentials.createInsecure(), {
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 5_000,
});
const call = client.Generate(
  { model, messages: [{ role: 'ROLE_USER', parts: [{ text: prompt }] }] },
  { deadline: Date.now() + DEADLINE_MS },
);
process.once('SIGINT', () => call.cancel());

try {
  let backend = '';
  let finished = null;
  for await (const event of call) {
    if (event.event === 'started' || event.event === 'continued') backend = event[event.event].backend;
    else if (event.event === 'delta') process.stdout.write(event.delta.text ?? '');
    else if (event.event === 'finished') finished = event.finished;
  }
  if (!finished) throw new Error('the stream ended without `finished`: what came is only a part of the answer');
  const { promptTokenCount, outputTokenCount } = finished.usage;
  console.error(
    `\nbackend ${backend}, ${finished.reason}, ${promptTokenCount} prompt tokens, ${outputTokenCount} output tokens`,
  );
} catch (error) {
  // Not process.exit(): what was written to a pipe may not have left yet.
  process.exitCode = error.code === grpc.status.CANCELLED ? 130 : 1;
  if (process.exitCode === 1) explain(error);
} finally {
  client.close();
}

function explain(error) {
  if (error.code === undefined) {
    console.error(`\n${error.message}`);
    return;
  }
  console.error(`\n${grpc.status[error.code]}: ${error.details}`);
  for (const detail of details(error)) {
    if (detail.reason) console.error(`reason ${detail.reason}`);
    for (const [key, value] of Object.entries(detail.metadata ?? {})) console.error(`  ${key}: ${value}`);
    for (const { field, description } of detail.fieldViolations ?? []) console.error(`field ${field}: ${description}`);
    if (detail.retryDelay) {
      console.error(`retry after ${Number(detail.retryDelay.seconds) + detail.retryDelay.nanos / 1e9} s`);
    }
  }
}

// Returns the details that are known here, decoded.
function details(error) {
  const [bytes] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!bytes) return [];
  return definition['google.rpc.Status'].deserialize(bytes).details.flatMap((any) => {
    const type = definition[any.type_url.split('/').pop()];
    return type ? [type.deserialize(any.value)] : [];
  });
}
