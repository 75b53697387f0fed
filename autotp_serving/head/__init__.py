"""The head: HTTP and engine in a process of their own, which starts the ranks, and starts them
anew. Never torch.
"""
