"""What else can run the base or hand out the work: vLLM and Ray."""
