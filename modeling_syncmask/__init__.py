"""SyncMask: synchronized attentional masking for fashion vision-language pretraining."""
