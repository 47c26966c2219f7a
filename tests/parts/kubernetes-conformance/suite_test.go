// Kubernetes' own conformance tests of a node, against a cluster that runs. Nothing of them is here: this says which parts of the
// suite are built, and hands over its flags.
package conformance

import (
	"flag"
	"fmt"
	"os"
	"testing"

	"k8s.io/kubernetes/test/e2e"
	_ "k8s.io/kubernetes/test/e2e/common"
	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"
	e2etestingmanifests "k8s.io/kubernetes/test/e2e/testing-manifests"
	"k8s.io/kubernetes/test/utils/image"
)

func TestMain(m *testing.M) {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	images := flag.Bool("images", false, "print the images that the tests name, and end")
	flag.Parse()
	if *images {
		for _, each := range []image.ImageID{
			image.Agnhost, image.AgnhostPrev, image.BusyBox, image.GlibcDnsTesting, image.Nginx, image.Nonewprivs, image.NonRoot, image.Pause,
		} {
			fmt.Println(image.GetE2EImage(each))
		}
		return
	}
	testfiles.AddFileSource(e2etestingmanifests.GetE2ETestingManifestsFS())
	framework.AfterReadingAllFlags(&framework.TestContext)
	os.Exit(m.Run())
}

func TestNodeConformance(t *testing.T) {
	e2e.RunE2ETests(t)
}
