#pragma once

// Marks what libtorchqat.so exports; everything else is hidden.
#define TORCHQAT_API __attribute__((visibility("default")))
