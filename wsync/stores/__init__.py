"""Checkpoints behind a URL: S3, Google Cloud, Azure, the Hugging Face hub, web servers.

A store lists names and reads ranges of one version of an object. It does not know what a checkpoint is. Imports
``layout`` and what lies below; obstore, boto3 and huggingface_hub only if a URL needs them.
"""

__all__ = ["path", "prefetch", "store"]
