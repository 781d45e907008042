"""An engine behind HTTP: admission, decoding and answering in bounded processes, nothing of a patient in logs."""
