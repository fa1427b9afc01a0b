// Ask streams one reply from Forebay: the answer to standard output, what became of it to standard error.
package main

//go:generate buf generate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "example.com/forebay-ask/gen/forebay/inference/v1"
)

// A model may have to be loaded first.
const deadline = 2 * time.Minute

var errNotWhole = errors.New("the stream ended without `finished`: what came is only a part of the answer")

func main() {
	arguments := os.Args[1:]
	if len(arguments) == 2 {
		arguments = append([]string{"127.0.0.1:50150"}, arguments...)
	}
	if len(arguments) != 3 {
		fmt.Fprintln(os.Stderr, "usage: ask [ADDRESS] MODEL PROMPT")
		os.Exit(2)
	}
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := ask(interrupted, arguments[0], arguments[1], arguments[2]); err != nil {
		if interrupted.Err() != nil {
			os.Exit(130)
		}
		explain(err)
		os.Exit(1)
	}
}

func ask(ctx context.Context, address, model, prompt string) error {
	// One connection serves a whole program and all of its calls at once.
	conn, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel() // returning early ends the generation, too
	stream, err := pb.NewInferenceServiceClient(conn).Generate(ctx, &pb.GenerateRequest{
		Model: model,
		Messages: []*pb.Message{{
			Role:  pb.Role_ROLE_USER,
			Parts: []*pb.Part{{Kind: &pb.Part_Text{Text: prompt}}},
		}},
	})
	if err != nil {
		return err
	}
	var backend string
	var finished *pb.Finished
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		switch event := response.Event.(type) {
		case *pb.GenerateResponse_Started:
			backend = event.Started.Backend
		case *pb.GenerateResponse_Continued:
			backend = event.Continued.Backend
		case *pb.GenerateResponse_Delta:
			fmt.Print(event.Delta.GetText())
		case *pb.GenerateResponse_Finished:
			finished = event.Finished
		}
	}
	if finished == nil {
		return errNotWhole
	}
	usage := finished.GetUsage()
	fmt.Fprintf(os.Stderr, "\nbackend %s, %s, %d prompt tokens, %d output tokens\n",
		backend, finished.Reason, usage.GetPromptTokenCount(), usage.GetOutputTokenCount())
	return nil
}

func explain(err error) {
	failure, ok := status.FromError(err)
	if !ok {
		fmt.Fprintf(os.Stderr, "\n%v\n", err)
		return
	}
	fmt.Fprintf(os.Stderr, "\n%s: %s\n", failure.Code(), failure.Message())
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Fprintf(os.Stderr, "reason %s\n", detail.Reason)
			for key, value := range detail.Metadata {
				fmt.Fprintf(os.Stderr, "  %s: %s\n", key, value)
			}
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Fprintf(os.Stderr, "field %s: %s\n", violation.Field, violation.Description)
			}
		case *errdetails.RetryInfo:
			fmt.Fprintf(os.Stderr, "retry after %g s\n", detail.RetryDelay.AsDuration().Seconds())
		}
	}
}
