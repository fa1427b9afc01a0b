//! Streams one reply from Forebay: the answer to standard output, what became of it to standard error.

use std::{process::ExitCode, time::Duration};

use tokio::io::{AsyncWriteExt, stdout};
use tonic::{Request, Status, transport::Endpoint};
use tonic_types::StatusExt;

#[allow(dead_code)] // the protos hold more than one program needs
mod pb {
    tonic::include_proto!("forebay.inference.v1");
}
use pb::{
    FinishReason, GenerateRequest, Message, Part, Role, delta::Content, generate_response::Event,
    inference_service_client::InferenceServiceClient, part::Kind,
};

/// A model may have to be loaded first.
const DEADLINE: Duration = Duration::from_secs(120);

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.len() == 2 {
        arguments.insert(0, "127.0.0.1:50150".into());
    }
    let [address, model, prompt] = &arguments[..] else {
        eprintln!("usage: ask [ADDRESS] MODEL PROMPT");
        return ExitCode::from(2);
    };
    // Dropping the stream that is not waited for any more cancels the call.
    let result = tokio::select! {
        result = ask(address, model, prompt) => result,
        _ = tokio::signal::ctrl_c() => return ExitCode::from(130),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match error.downcast_ref::<Status>() {
                Some(status) => explain(status),
                None => eprintln!("\n{error}"),
            }
            ExitCode::FAILURE
        }
    }
}

async fn ask(address: &str, model: &str, prompt: &str) -> Result<(), Error> {
    // One channel serves a whole program and all of its calls at once; clones of it share the connection.
    let channel = Endpoint::from_shared(format!("http://{address}"))?
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .connect_lazy();
    let mut request = Request::new(GenerateRequest {
        model: model.into(),
        messages: vec![Message {
            role: Role::User.into(),
            parts: vec![Part {
                kind: Some(Kind::Text(prompt.into())),
            }],
        }],
        ..Default::default()
    });
    request.set_timeout(DEADLINE);
    let mut stream = InferenceServiceClient::new(channel)
        .generate(request)
        .await?
        .into_inner();
    let (mut backend, mut finished, mut out) = (String::new(), None, stdout());
    while let Some(response) = stream.message().await? {
        match response.event {
            Some(Event::Started(started)) => backend = started.backend,
            Some(Event::Continued(continued)) => backend = continued.backend,
            Some(Event::Delta(delta)) => {
                if let Some(Content::Text(text)) = delta.content {
                    out.write_all(text.as_bytes()).await?;
                    out.flush().await?;
                }
            }
            Some(Event::Finished(event)) => finished = Some(event),
            _ => {}
        }
    }
    let finished = finished
        .ok_or("the stream ended without `finished`: what came is only a part of the answer")?;
    let reason = FinishReason::try_from(finished.reason)
        .unwrap_or_default()
        .as_str_name();
    let usage = finished.usage.unwrap_or_default();
    eprintln!(
        "\nbackend {backend}, {reason}, {} prompt tokens, {} output tokens",
        usage.prompt_token_count, usage.output_token_count
    );
    Ok(())
}

fn explain(status: &Status) {
    eprintln!("\n{:?}: {}", status.code(), status.message());
    let details = status.get_error_details();
    if let Some(info) = details.error_info() {
        eprintln!("reason {}", info.reason);
        for (key, value) in &info.metadata {
            eprintln!("  {key}: {value}");
        }
    }
    for violation in details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
    {
        eprintln!("field {}: {}", violation.field, violation.description);
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        eprintln!("retry after {} s", delay.as_secs_f64());
    }
}
