"""Models to try the servers with, as ordinary Hugging Face folders.

smollm2.py fetches a small one that answers, gguf_model.py converts any other GGUF file,
random_model.py makes one whose text means nothing. sglang_hma.demo_model is their command.
"""
