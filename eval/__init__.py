"""What compression cost: perplexity, true size."""
