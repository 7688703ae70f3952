"""The walk of training data: JSONL rows checked (`rows`) and tokenised into array_record (`builders`), which rows make batches
with which (`streams`), which come when (`order`), and what a batch holds (`pipeline`)."""
