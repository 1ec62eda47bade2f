"""Between processes of one Linux machine that compute on its CPUs: tensors through memory."""
