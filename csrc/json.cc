#include "csrc/json.h"

#include <cstdio>
#include <cstdlib>

namespace jml {
namespace {

struct Cursor {
  const char* p;

  void space() {
    while (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r') ++p;
  }
  bool take(char c) {
    space();
    if (*p != c) return false;
    ++p;
    return true;
  }
  bool word(const char* w) {
    const char* q = p;
    while (*w != '\0') {
      if (*q++ != *w++) return false;
    }
    p = q;
    return true;
  }
  // Strings here are identifiers and paths: the short escapes are enough.
  bool string(std::string* out) {
    if (!take('"')) return false;
    while (*p != '"') {
      if (*p == '\0') return false;
      if (*p == '\\') {
        ++p;
        switch (*p) {
          case 'n':
            *out += '\n';
            break;
          case 't':
            *out += '\t';
            break;
          case '"':
          case '\\':
          case '/':
            *out += *p;
            break;
          default:
            return false;
        }
        ++p;
      } else {
        *out += *p++;
      }
    }
    ++p;
    return true;
  }
  bool value(JsonValue* out) {
    space();
    if (*p == '"') {
      std::string s;
      if (!string(&s)) return false;
      *out = s;
      return true;
    }
    if (word("true")) {
      *out = true;
      return true;
    }
    if (word("false")) {
      *out = false;
      return true;
    }
    char* end = nullptr;
    const double d = std::strtod(p, &end);
    if (end == p) return false;
    p = end;
    *out = d;
    return true;
  }
};

}  // namespace

bool FlatJson::parse(const std::string& text, std::string* error) {
  values_.clear();
  Cursor c{text.c_str()};
  auto fail = [&](const char* what) {
    *error = std::string("expected ") + what + " at character " +
             std::to_string(c.p - text.c_str()) + " of " + text;
    return false;
  };
  if (!c.take('{')) return fail("an object");
  if (!c.take('}')) {
    do {
      std::string key;
      JsonValue value;
      c.space();
      if (!c.string(&key)) return fail("a quoted key");
      if (!c.take(':')) return fail("':'");
      if (!c.value(&value)) return fail("a string, number or boolean");
      values_[key] = value;
    } while (c.take(','));
    if (!c.take('}')) return fail("',' or '}'");
  }
  c.space();
  return *c.p == '\0' ? true : fail("the end");
}

std::string json_quote(const std::string& s) {
  std::string r = "\"";
  for (char ch : s) {
    if (ch == '"' || ch == '\\') {
      r += '\\';
      r += ch;
    } else if (static_cast<unsigned char>(ch) < 0x20) {
      char buf[8];
      std::snprintf(buf, sizeof(buf), "\\u%04x", ch);
      r += buf;
    } else {
      r += ch;
    }
  }
  return r + "\"";
}

JsonWriter& JsonWriter::raw(const char* key, const std::string& json) {
  if (!body_.empty()) body_ += ", ";
  body_ += json_quote(key) + ": " + json;
  return *this;
}

JsonWriter& JsonWriter::field(const char* key, const std::string& value) {
  return raw(key, json_quote(value));
}

}  // namespace jml
