"""Other packages that load by fst after one call: `fst.integrations.transformers.install()`."""
