"""Floor 0: popularity, hot set, row placement and schedule as plain numpy values; no torchrec, no process group."""
