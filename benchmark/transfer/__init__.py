"""How the KV cache travels: layer by layer against after the forward, BFP8 against BF16."""
