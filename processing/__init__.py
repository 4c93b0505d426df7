"""Raw data to tensors: the processor, corpus readers, the generated corpus, augmentation and the collator."""
