"""Floor 1: batches, readers, the calibrator and the hot/cold loader; no process group."""
