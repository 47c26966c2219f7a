// Package conformance runs containerd's own suite for snapshotters against nixlet's, over its socket.
//
// The suite is told that this is overlayfs: it then leaves out renaming a directory of a lower layer, which no overlay can do without
// redirects in the container's own mount.
//
// NIXLET is the program that serves (`nixlet snapshotter …`), as a list separated by spaces. With -test.root, as the suite wants it.
package conformance

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// serve starts a snapshotter below a directory and connects to it; the returned function ends both.
func serve(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(root, "s", "s.sock")
	words := append(strings.Fields(os.Getenv("NIXLET")), "--root", filepath.Join(root, "r"), "--address", socket)
	server := exec.Command(words[0], words[1:]...)
	log, err := os.Create(filepath.Join(root, "log"))
	if err != nil {
		return nil, nil, err
	}
	server.Stderr = log
	if err := server.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() error {
		defer log.Close()
		server.Process.Signal(syscall.SIGTERM)
		return server.Wait()
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	client := snapshotsapi.NewSnapshotsClient(connection)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err = client.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "is anybody there"}); strings.Contains(fmt.Sprint(err), "NotFound") {
			break
		}
		if time.Now().After(deadline) {
			stop()
			text, _ := os.ReadFile(filepath.Join(root, "log"))
			return nil, nil, fmt.Errorf("the snapshotter does not serve: %w: %s", err, text)
		}
	}
	return proxy.NewSnapshotter(client, "nix"), func() error {
		connection.Close()
		return stop()
	}, nil
}

// TestFreshInstances gives each case a snapshotter of its own.
func TestFreshInstances(t *testing.T) {
	testsuite.SnapshotterSuite(t, "overlayfs", serve)
}

// TestSharedInstance gives all cases one snapshotter, as a containerd does.
func TestSharedInstance(t *testing.T) {
	snapshotter, stop, err := serve(context.Background(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	// The cases run in parallel, after this function has returned.
	t.Cleanup(func() { stop() })
	testsuite.SnapshotterSuite(t, "overlayfs", func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		return snapshotter, func() error { return nil }, nil
	})
}
