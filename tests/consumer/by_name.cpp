// Calls operators through the dispatcher only: prints how many straight-through estimators there are.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torchqat/torchqat.h>

#include <iostream>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("qat::ste_names", "");
  std::cout << op.typed<std::vector<std::string>()>().call().size() << '\n';
}
