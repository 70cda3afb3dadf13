"""Checkpoints behind a URL: S3, Google Cloud, Azure, the Hugging Face hub, web servers.

A store lists names and reads ranges of one version of an object; apart from some file names it knows nothing about
checkpoints. Imports ``layout`` and the rooms below it; obstore, boto3 and huggingface_hub only if a URL needs them.
"""

__all__ = ["path", "prefetch", "store"]
