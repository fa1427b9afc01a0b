//! Generates the stubs from the protos of the repository. protox is a compiler in Rust: no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=../../protos");
    let protos = protox::compile(["forebay/inference/v1/inference.proto"], ["../../protos"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(protos)?;
    Ok(())
}
