"""One section a file: what it finds, as a frozen value. Imports no renderer."""
