"""The report: `python -m portrait_world.report` evaluates every method and writes docs/evidence.md."""
