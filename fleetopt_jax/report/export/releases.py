"""What is written for: the releases whose flags are tested, and the port that everything listens on."""

VLLM_RELEASE = "0.33.0"
STAGE_ROUTER_RELEASE = "0.1.17"  # of vLLM's own router (PyPI's vllm-router), which stands before pools of two stages
PORT = 8000
DYNAMO_RELEASE = "1.5.0"  # of NVIDIA Dynamo, whose custom resources are nvidia.com/v1beta1
DYNAMO_VLLM_RELEASE = "0.28.0"  # of the image of that release (its page of compatibility)
