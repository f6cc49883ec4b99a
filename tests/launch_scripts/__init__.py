"""Training scripts that know nothing of fae_torchrec, which `fae launch` runs in tests."""
