"""Stage 2: pre-training with DeepSpeed ZeRO, one worker a device, under Ray Train or torchrun."""
