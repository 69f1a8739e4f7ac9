"""Speculative decoding on decode: drafts are verified as chains over BFP8 and BF16 pages.

worker.py   a step: chains of drafts, verified in one forward
ngram.py    SGLang's NGRAM: drafts from what was said before
draft_model.py  SGLang's STANDALONE: a small model drafts, with a KV pool of its own
catching_up.py  how that model comes to have the KV of a prompt
chain.py    a tree of drafts as one chain, and which of a chain's drafts are right
sampling.py SGLang's own sampler over the rows of a chain
slots.py    BF16 pages ahead of a request, which its drafts need
handover.py a request whose prompt a prefill server has computed begins to draft
"""
