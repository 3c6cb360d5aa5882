// Kstatus prints the status that GitOps tools derive from Kubernetes objects.
//
// It reads objects as JSON documents from standard input (a document of kind List stands for its items) and prints, one
// a line, {"kind", "namespace", "name", "status", "message"}. Status is one of Current, InProgress, Failed, Terminating,
// NotFound and Unknown, by the library that Flux waits with.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type line struct {
	Kind      string        `json:"kind"`
	Namespace string        `json:"namespace"`
	Name      string        `json:"name"`
	Status    status.Status `json:"status"`
	Message   string        `json:"message"`
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "kstatus:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	decoder, encoder := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var document json.RawMessage
		if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		// unstructured's own decoder keeps integers integers, as the API server's clients do
		parsed, _, err := unstructured.UnstructuredJSONScheme.Decode(document, nil, nil)
		if err != nil {
			return err
		}
		switch object := parsed.(type) {
		case *unstructured.UnstructuredList:
			for i := range object.Items {
				if err := print(encoder, &object.Items[i]); err != nil {
					return err
				}
			}
		case *unstructured.Unstructured:
			if err := print(encoder, object); err != nil {
				return err
			}
		}
	}
}

func print(encoder *json.Encoder, object *unstructured.Unstructured) error {
	result, err := status.Compute(object)
	if err != nil {
		return fmt.Errorf("%s %s/%s: %w", object.GetKind(), object.GetNamespace(), object.GetName(), err)
	}
	return encoder.Encode(line{object.GetKind(), object.GetNamespace(), object.GetName(), result.Status, result.Message})
}
