"""A rank's work: run batches on the loaded model, sample. Every rank."""
