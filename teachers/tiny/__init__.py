"""The bundled tiny teacher, its base students, and how they were trained."""
