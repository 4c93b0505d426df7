"""The Accelerate loop: arguments, sampler, teacher, optimiser and checkpoints."""

import os

# Threads that wait for each other sleep instead of spinning. Beside one other busy process on two cores, steps of the
# quickstart took 1.3 s so and 4 to 8 s otherwise. OpenMP reads this once, when torch is loaded, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
