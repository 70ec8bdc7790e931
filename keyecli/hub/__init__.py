"""Model files from the Hugging Face hub into its own cache: listed, chosen, fetched, verified; the only network of keye."""
