// containerd-stargz-grpc on stargz-snapshotter's library: its own program can't be had as a Go module. It takes the flags and the file
// of that one, without a FUSE manager, and refuses keys that it doesn't know.
package main

import (
	"context"
	"flag"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/keychain/cri"
	"github.com/containerd/stargz-snapshotter/service/keychain/dockerconfig"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type configuration struct {
	service.Config
	MetadataStore string `toml:"metadata_store"`
}

func main() {
	address := flag.String("address", "/run/containerd-stargz-grpc/containerd-stargz-grpc.sock", "where it serves")
	file := flag.String("config", "/etc/containerd-stargz-grpc/config.toml", "its configuration")
	root := flag.String("root", "/var/lib/containerd-stargz-grpc", "its directory")
	level := flag.String("log-level", "info", "how much it logs")
	flag.Parse()
	check(log.SetLevel(*level))
	check(log.SetFormat(log.JSONFormat))
	var config configuration
	text, err := os.Open(*file)
	check(err)
	check(toml.NewDecoder(text).DisallowUnknownFields().Decode(&config))
	text.Close()

	ctx := context.Background()
	server := grpc.NewServer()
	credentials := []resolver.Credential{dockerconfig.NewDockerconfigKeychain(ctx)}
	if config.CRIKeychainConfig.EnableKeychain {
		connect := func() (runtime.ImageServiceClient, error) {
			to := "unix://" + config.CRIKeychainConfig.ImageServicePath
			connection, err := grpc.NewClient(to, grpc.WithTransportCredentials(insecure.NewCredentials()))
			return runtime.NewImageServiceClient(connection), err
		}
		credential, images := cri.NewCRIKeychain(ctx, connect)
		credentials = append(credentials, credential)
		runtime.RegisterImageServiceServer(server, images)
	}
	snapshotter, err := service.NewStargzSnapshotterService(
		ctx, *root, &config.Config,
		service.WithCredsFuncs(credentials...), service.WithFilesystemOptions(fs.WithMetadataStore(memory.NewReader)),
	)
	check(err)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	check(os.RemoveAll(*address))
	listener, err := net.Listen("unix", *address)
	check(err)
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, os.Interrupt, syscall.SIGTERM)
	go func() { check(server.Serve(listener)) }()
	<-ended
	check(snapshotter.Close())
}

func check(err error) {
	if err != nil {
		log.L.WithError(err).Fatal("it ends")
	}
}
