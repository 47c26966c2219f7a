"""What a Kubernetes cluster is made of before anything of it runs: certificates, tokens, kubeconfig files, the programs' configuration."""
