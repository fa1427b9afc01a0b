package example;

import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import forebay.inference.v1.Inference.Finished;
import forebay.inference.v1.Inference.GenerateRequest;
import forebay.inference.v1.Inference.GenerateResponse;
import forebay.inference.v1.Inference.Message;
import forebay.inference.v1.Inference.Part;
import forebay.inference.v1.Inference.Role;
import forebay.inference.v1.InferenceServiceGrpc;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.Iterator;
import java.util.concurrent.TimeUnit;

/** Streams one reply from Forebay: the answer to standard output, what became of it to standard error. */
public final class Ask {
  /** A model may have to be loaded first. */
  private static final int DEADLINE_SECONDS = 120;

  // The answer is UTF-8 whatever the platform's own encoding is.
  private static final PrintStream OUT = new PrintStream(System.out, true, StandardCharsets.UTF_8);
  private static final PrintStream ERR = new PrintStream(System.err, true, StandardCharsets.UTF_8);

  public static void main(String[] args) throws InvalidProtocolBufferException {
    if (args.length < 2 || args.length > 3) {
      ERR.println("usage: ask [ADDRESS] MODEL PROMPT");
      System.exit(2);
    }
    String address = args.length == 3 ? args[0] : "127.0.0.1:50150";
    // One channel serves a whole program and all of its calls at once.
    ManagedChannel channel =
        Grpc.newChannelBuilder(address, InsecureChannelCredentials.create())
            .keepAliveTime(10, TimeUnit.SECONDS)
            .keepAliveTimeout(5, TimeUnit.SECONDS)
            .build();
    Context.CancellableContext context = Context.current().withCancellation();
    // Ctrl-C ends the JVM, which exits with 130 after this: the server is told, and stops generating.
    Runtime.getRuntime().addShutdownHook(new Thread(() -> {
      context.cancel(null);
      channel.shutdown();
    }));
    int code = 0;
    Context before = context.attach();
    try {
      ask(channel, args[args.length - 2], args[args.length - 1]);
    } catch (StatusRuntimeException error) {
      if (!context.isCancelled()) {
        explain(error);
      }
      code = 1;
    } catch (NotWholeException error) {
      ERR.println("\n" + error.getMessage());
      code = 1;
    } finally {
      context.detach(before);
    }
    System.exit(code);
  }

  private static void ask(ManagedChannel channel, String model, String prompt) throws NotWholeException {
    GenerateRequest request =
        GenerateRequest.newBuilder()
            .setModel(model)
            .addMessages(
                Message.newBuilder().setRole(Role.ROLE_USER).addParts(Part.newBuilder().setText(prompt)))
            .build();
    Iterator<GenerateResponse> events =
        InferenceServiceGrpc.newBlockingStub(channel)
            .withDeadlineAfter(DEADLINE_SECONDS, TimeUnit.SECONDS)
            .generate(request);
    String backend = "";
    Finished finished = null;
    while (events.hasNext()) {
      GenerateResponse event = events.next();
      switch (event.getEventCase()) {
        case STARTED -> backend = event.getStarted().getBackend();
        case CONTINUED -> backend = event.getContinued().getBackend();
        case DELTA -> {
          OUT.print(event.getDelta().getText());
          OUT.flush();
        }
        case FINISHED -> finished = event.getFinished();
        default -> { } // kinds that were added later
      }
    }
    if (finished == null) {
      throw new NotWholeException();
    }
    ERR.printf("%nbackend %s, %s, %d prompt tokens, %d output tokens%n", backend, finished.getReason(),
        finished.getUsage().getPromptTokenCount(), finished.getUsage().getOutputTokenCount());
  }

  private static void explain(StatusRuntimeException error) throws InvalidProtocolBufferException {
    ERR.printf("%n%s: %s%n", error.getStatus().getCode(), error.getStatus().getDescription());
    for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        ErrorInfo info = detail.unpack(ErrorInfo.class);
        ERR.println("reason " + info.getReason());
        info.getMetadataMap().forEach((key, value) -> ERR.println("  " + key + ": " + value));
      } else if (detail.is(BadRequest.class)) {
        detail.unpack(BadRequest.class).getFieldViolationsList()
            .forEach(each -> ERR.println("field " + each.getField() + ": " + each.getDescription()));
      } else if (detail.is(RetryInfo.class)) {
        Duration delay = detail.unpack(RetryInfo.class).getRetryDelay();
        double seconds = delay.getSeconds() + delay.getNanos() / 1e9;
        ERR.println("retry after " + seconds + " s");
      }
    }
  }

  /** The stream ended well and without `finished`. */
  private static final class NotWholeException extends Exception {
    NotWholeException() {
      super("the stream ended without `finished`: what came is only a part of the answer");
    }
  }
}
