"""Where the work runs: the one room of the pipeline that knows Ray."""
