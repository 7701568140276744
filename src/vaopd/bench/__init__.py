"""`vaopd bench`: what a step, a loss, a rollout and a whole training step cost, as ratios of one run. See docs/performance.md."""
