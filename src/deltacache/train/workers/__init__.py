"""One training run over several processes; one module imports ray."""
