"""Pictures of runs: learning curves, a page, a film."""
