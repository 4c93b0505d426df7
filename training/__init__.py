"""The Accelerate loop: arguments, sampler, teacher, optimiser and checkpoints."""
