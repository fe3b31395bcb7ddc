"""Ways of carrying a StepPlan to the device: in this process (uniproc) or a scripted stand-in for tests (mock)."""
