"""The walk of training data: JSONL rows to array_record (`builders`), array_record to batches (`pipeline`)."""
