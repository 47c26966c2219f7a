package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strconv"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// TestCallTimes measures a snapshotter that serves already, as containerd calls it, and prints the times of its calls as JSON
// (microseconds): for benchmarks. CALLS_ADDRESS is its socket; CALLS_CLIENTS go through CALLS_CYCLES each, at the same time;
// containers are made on CALLS_PARENT if it is set. CALLS_SNAPSHOTTER is its name behind a containerd's socket.
func TestCallTimes(t *testing.T) {
	address := os.Getenv("CALLS_ADDRESS")
	if address == "" {
		t.Skip("no snapshotter to measure: CALLS_ADDRESS is not set")
	}
	clients, _ := strconv.Atoi(os.Getenv("CALLS_CLIENTS"))
	cycles, _ := strconv.Atoi(os.Getenv("CALLS_CYCLES"))
	name, parent := os.Getenv("CALLS_SNAPSHOTTER"), os.Getenv("CALLS_PARENT")
	ctx := metadata.AppendToOutgoingContext(context.Background(), "containerd-namespace", "calls")
	// Behind containerd's socket what nobody refers to would be collected at any time.
	kept := map[string]string{"containerd.io/gc.root": "calls"}
	unique := strconv.FormatInt(time.Now().UnixNano(), 36)
	var lock sync.Mutex
	times := map[string][]float64{}
	work := func(client int) error {
		connection, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer connection.Close()
		snapshots := snapshotsapi.NewSnapshotsClient(connection)
		for cycle := -cycles / 10; cycle < cycles; cycle++ {
			key := fmt.Sprintf("%s-%d-%d", unique, client, cycle)
			active, committed, view := "a-"+key, "c-"+key, "v-"+key
			steps := []struct {
				method string
				call   func() error
			}{
				{"Prepare", func() error {
					_, err := snapshots.Prepare(ctx, &snapshotsapi.PrepareSnapshotRequest{Snapshotter: name, Key: active, Parent: parent, Labels: kept})
					return err
				}},
				{"Mounts", func() error {
					_, err := snapshots.Mounts(ctx, &snapshotsapi.MountsRequest{Snapshotter: name, Key: active})
					return err
				}},
				{"Stat", func() error {
					_, err := snapshots.Stat(ctx, &snapshotsapi.StatSnapshotRequest{Snapshotter: name, Key: active})
					return err
				}},
				{"Commit", func() error {
					_, err := snapshots.Commit(ctx, &snapshotsapi.CommitSnapshotRequest{Snapshotter: name, Name: committed, Key: active, Labels: kept})
					return err
				}},
				{"View", func() error {
					_, err := snapshots.View(ctx, &snapshotsapi.ViewSnapshotRequest{Snapshotter: name, Key: view, Parent: committed, Labels: kept})
					return err
				}},
				{"Remove", func() error {
					_, err := snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: name, Key: view})
					return err
				}},
			}
			for _, step := range steps {
				start := time.Now()
				if err := step.call(); err != nil {
					return fmt.Errorf("%s: %w", step.method, err)
				}
				taken := float64(time.Since(start).Nanoseconds()) / 1000
				if cycle >= 0 {
					lock.Lock()
					times[step.method] = append(times[step.method], taken)
					lock.Unlock()
				}
			}
			if _, err := snapshots.Remove(ctx, &snapshotsapi.RemoveSnapshotRequest{Snapshotter: name, Key: committed}); err != nil {
				return err
			}
		}
		return nil
	}
	failed := make(chan error, clients)
	for client := range clients {
		go func() { failed <- work(client) }()
	}
	for range clients {
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	}
	figures := map[string]map[string]float64{}
	for method, values := range times {
		sort.Float64s(values)
		figures[method] = map[string]float64{
			"p50": values[len(values)/2], "p99": values[len(values)*99/100], "calls": float64(len(values)),
		}
	}
	text, err := json.Marshal(figures)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("calls %s\n", text)
}
