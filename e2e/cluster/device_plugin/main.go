// Device-plugin tells a kubelet of devices that are not there, so that Pods which ask for GPUs are scheduled and started.
//
// It is given the folder of the kubelet's device plugins, the name of a resource and how many there are; what a container
// is given of them is the variable NVIDIA_VISIBLE_DEVICES, as NVIDIA's own plugin does, and no device.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	plugin "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const socket = "evenhand-stub.sock"

type server struct {
	plugin.UnimplementedDevicePluginServer
	devices []*plugin.Device
}

func (s *server) GetDevicePluginOptions(context.Context, *plugin.Empty) (*plugin.DevicePluginOptions, error) {
	return &plugin.DevicePluginOptions{}, nil
}

// ListAndWatch tells of all devices once: they stay well for as long as this runs.
func (s *server) ListAndWatch(_ *plugin.Empty, stream plugin.DevicePlugin_ListAndWatchServer) error {
	if err := stream.Send(&plugin.ListAndWatchResponse{Devices: s.devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (s *server) Allocate(_ context.Context, request *plugin.AllocateRequest) (*plugin.AllocateResponse, error) {
	answer := &plugin.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		given := map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")}
		answer.ContainerResponses = append(answer.ContainerResponses, &plugin.ContainerAllocateResponse{Envs: given})
	}
	return answer, nil
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "device-plugin:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) != 3 {
		return fmt.Errorf("usage: device-plugin FOLDER RESOURCE COUNT")
	}
	folder, resource := arguments[0], arguments[1]
	count, err := strconv.Atoi(arguments[2])
	if err != nil {
		return err
	}
	stub := &server{}
	for i := range count {
		stub.devices = append(stub.devices, &plugin.Device{ID: fmt.Sprintf("stub-%d", i), Health: plugin.Healthy})
	}
	listener, err := net.Listen("unix", filepath.Join(folder, socket))
	if err != nil {
		return err
	}
	serving := grpc.NewServer()
	plugin.RegisterDevicePluginServer(serving, stub)
	failed := make(chan error, 1)
	go func() { failed <- serving.Serve(listener) }()
	if err := register(folder, resource); err != nil {
		return err
	}
	return <-failed
}

func register(folder, resource string) error {
	connection, err := grpc.NewClient("unix://"+filepath.Join(folder, "kubelet.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = plugin.NewRegistrationClient(connection).Register(context.Background(),
		&plugin.RegisterRequest{Version: plugin.Version, Endpoint: socket, ResourceName: resource})
	return err
}
