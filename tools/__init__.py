"""What a developer runs: bring a host, test, demonstrate. Needs nothing but Python to start."""
