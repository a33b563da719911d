"""Latent attributes of responses: what they are (`catalog`), and who rewrites and judges texts by them (`teacher`).

A teacher is any server of the chat-completions protocol (`chat`) or, without a network, the lexicon of the package
(`lexicon_teacher`); `asking` sends it many tasks with a cache, a rate and a limit on cost.
"""
