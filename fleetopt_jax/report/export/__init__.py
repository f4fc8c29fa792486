"""A plan as what starts it: vLLM command lines, Kubernetes manifests, and the router before them."""
