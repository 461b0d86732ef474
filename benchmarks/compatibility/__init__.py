"""What lowbit works with: architectures, libraries, and what each of them found (``docs/compatibility.md``)."""
