"""Visual tokenizers: fitted, trained, judged, applied."""
