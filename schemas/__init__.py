"""What the stages agree on: a config and a manifest per stage, the descriptor of a file, the kinds of failure.

Importable without torch, Arrow or any other heavy library, so that `cpipe --help` stays quick.
"""
