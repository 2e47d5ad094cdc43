// Flat JSON, the text that crosses the C ABI: one object of strings, numbers and booleans.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>

namespace jml {

using JsonValue = std::variant<std::string, double, bool>;

class FlatJson {
 public:
  // False, with `error` set, unless `text` is one flat object.
  bool parse(const std::string& text, std::string* error);

  const std::map<std::string, JsonValue>& values() const { return values_; }
  const JsonValue* find(const std::string& key) const {
    auto it = values_.find(key);
    return it == values_.end() ? nullptr : &it->second;
  }

 private:
  std::map<std::string, JsonValue> values_;
};

// Builds one JSON object; nested text is appended as it is.
class JsonWriter {
 public:
  JsonWriter& field(const char* key, const std::string& value);
  JsonWriter& field(const char* key, const char* value) { return field(key, std::string(value)); }
  JsonWriter& field(const char* key, int64_t value) { return raw(key, std::to_string(value)); }
  JsonWriter& field(const char* key, int value) { return field(key, int64_t(value)); }
  JsonWriter& raw(const char* key, const std::string& json);
  std::string text() const { return "{" + body_ + "}"; }

 private:
  std::string body_;
};

std::string json_quote(const std::string& s);

}  // namespace jml
